"""Profiles that ship with xcalib, each with its evidence; read them with ``importlib.resources.files("xcalib.profiles")``."""
