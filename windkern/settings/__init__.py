"""Settings: dataclasses filled from YAML files and command lines."""
