"""The built-in demo weights, and the function that writes notes for them."""
