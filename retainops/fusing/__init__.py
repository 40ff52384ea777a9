"""`fuse`: swap what a model computes for the fused ops, and back."""

from retainops.fusing.model import fuse, unfuse
from retainops.fusing.registry import Change, Rule, fuse_rule
from retainops.fusing.table import Row, Table

__all__ = ["Change", "Row", "Rule", "Table", "fuse", "fuse_rule", "unfuse"]
