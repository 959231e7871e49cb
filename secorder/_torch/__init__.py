"""Every private or version-dependent thing of PyTorch that the library uses, each behind a function that names it.

A new PyTorch that breaks one of them fails that one's test in ``tests/_torch``.
"""
