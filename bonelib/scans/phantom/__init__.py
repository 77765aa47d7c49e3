"""Phantoms of the distal radius: drawn from a population, scanned, and moved; `make_cohort` writes a whole study."""

from bonelib.scans.phantom.cohort import make_cohort, make_radius

__all__ = ["make_cohort", "make_radius"]
