"""Texts that ship with xcalib, one folder per category; LICENSE.md says where each comes from."""
