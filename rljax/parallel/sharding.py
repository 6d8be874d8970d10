def constrain(x, axes):
    return x
