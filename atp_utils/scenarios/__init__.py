"""The scenarios of the paper, one module each; `registry` finds them."""
