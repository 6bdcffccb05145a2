"""Annotations as tools export them: outlines, runs and boxes in files of their own become masks of train ids."""
