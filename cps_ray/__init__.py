"""cps_ray: sweeps of semi-supervised segmentation trainings with Cross Pseudo Supervision on Ray. Importing it loads nothing."""

__version__ = "0.1.0"
