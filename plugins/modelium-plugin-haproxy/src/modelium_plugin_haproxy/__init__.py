"""HAProxy as the data path of Modelium."""
