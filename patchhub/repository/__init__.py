"""The front door: `Repository`, the product as a class, with a method for every verb of the command line.

Names and options are those of `patchhub VERB`: a dash is an underscore, `--no-x` is ``x=False``, a word that Python keeps for itself ends
with an underscore, and the verbs of a group carry its name (`remote_add`). There is no logic here: a method turns plain arguments into
what porcelain wants. Cheap checks come first, since what is behind them may import torch.
"""

from patchhub.repository.door import Repository, clone, open

__all__ = ["Repository", "clone", "open"]
