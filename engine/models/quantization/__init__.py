"""Quantised weights: what a checkpoint's quantization_config means for each linear.

A method (one file each) says how the checkpoint stores a part of a linear, and reads it into a
matrix that several methods share; a matrix knows how to multiply. Models and adapters know nothing
of this: to them it is another weight of a Linear.
"""
