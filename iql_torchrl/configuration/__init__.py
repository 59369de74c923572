"""Every option declared once, and the recipes' command lines made of these declarations.

Imports neither torch nor Hydra by itself: losses, networks and sources take the ranges of their arguments from here.
"""
