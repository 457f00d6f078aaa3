"""Questions that take several federations: comparison of defenses, calibration of measures, tuning."""
