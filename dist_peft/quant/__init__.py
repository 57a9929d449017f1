"""Codecs of frozen weights, and the matrix product with a packed weight.

``codec`` defines the protocol; ``nf4`` and ``affine`` are two; ``pack`` has bit streams, ``rows``
the fields of a packed row, ``kernels`` the decoding loops, ``matmul`` the autograd function.
"""
