"""The program that a region runs, and the functions its bodies call."""
