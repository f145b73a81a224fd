"""What comes from outside: models, calibration texts, tasks; their content identity, and tokens made of them."""
