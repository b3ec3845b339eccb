"""Every private name of torch that fxmem uses, with a probe for each in the tests."""
