"""The science, torch only: networks, losses, mixing, schedules, step, state, loop, metrics. Knows neither Ray nor files of data."""
