"""Procedural pictures of three grey boxes, and sentences about them that are exactly true or false.

The scenes are of the kind of NLVR (Suhr et al. 2017): towers of stacked squares, or scattered shapes.
"""
