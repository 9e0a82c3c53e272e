"""The tables and figures of the paper on one's own pair: as its scripts compute them, and
controlled.
"""
