"""What runs in a step: autograd functions, loops, what is kept between."""
