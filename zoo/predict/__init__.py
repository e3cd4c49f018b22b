"""How long a model takes: predicted from its cost for a device, calibrated on the device at hand, and measured."""
