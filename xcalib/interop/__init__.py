"""Thresholds that other tools wrote or will read: tables of the public implementation, config.json, other profiles.

Nothing here measures or searches. Files are read as data and never run; docs/interop.md describes the forms.
"""

from xcalib.interop.compare import MovedHead, PointDifference, ProfileDifference, compare_profiles
from xcalib.interop.config import config_with_block, sparse_attention_block
from xcalib.interop.identity import model_identity, read_config
from xcalib.interop.tables import Table, bin_for_length, profile_from_table, read_table, table_name, table_text

__all__ = [
    "MovedHead",
    "PointDifference",
    "ProfileDifference",
    "Table",
    "bin_for_length",
    "compare_profiles",
    "config_with_block",
    "model_identity",
    "profile_from_table",
    "read_config",
    "read_table",
    "sparse_attention_block",
    "table_name",
    "table_text",
]
