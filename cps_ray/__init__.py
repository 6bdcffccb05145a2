"""cps_ray: sweeps of semi-supervised segmentation trainings with Cross Pseudo Supervision on Ray. Importing it loads nothing."""

import os

# albumentations asks the package index for a newer version when it is imported: in each worker, behind whatever firewall.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
