"""Simulated arms: pixel counts of trainings on images, with effects of the training, of the image, and of both together."""

import numpy as np

CLASSES = ("road", "sky", "building", "tree", "car", "person", "sign")
_RARITY = np.array([3.0, 2.0, 2.0, 1.0, 0.8, 0.3, 0.1])
_EASE = np.array([2.0, 1.5, 1.5, 1.0, 0.8, 0.5, 0.0])
"""Log odds with which a pixel of each class is found."""


def simulate_images(rng: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the true pixels per class (I, C) and how easy each image is, (I, 1), in log odds: the same for all who predict it."""
    true = np.stack([rng.multinomial(4000, rng.dirichlet(_RARITY)) for _ in range(images)])
    return true, rng.normal(0.0, 0.8, (images, 1))


def simulate_arm(
    rng: np.random.Generator,
    images: tuple[np.ndarray, np.ndarray],
    of_trainings: np.ndarray,
    *,
    of_both: float = 0.3,
) -> np.ndarray:
    """Returns found, true and predicted pixels (N, I, 3, C) of trainings with these effects (N, C), in log odds. `of_both`: deviation of what an
    image has with one training alone, and of what it has with the arm."""
    (true, ease), made = images, []
    frequent = true.sum(0) / true.sum() / 2 + 1 / (2 * len(_EASE))
    of_arm = rng.normal(0.0, of_both, (len(true), 1))
    for of_training in of_trainings:
        odds = _EASE + of_training + ease + of_arm + rng.normal(0.0, of_both, true.shape)
        found = rng.binomial(true, 1 / (1 + np.exp(-odds)))
        made.append(np.stack([found, true, found + rng.multinomial((true - found).sum(1), frequent)], axis=1))
    return np.stack(made)
