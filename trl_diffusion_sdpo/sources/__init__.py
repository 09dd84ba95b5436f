"""A user's data: formats of columns, labels, undecoded images, several data sets as one."""
