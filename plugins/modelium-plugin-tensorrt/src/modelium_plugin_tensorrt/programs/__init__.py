"""What runs in other Pythons than Modelium's, as programs of their own: nothing here imports anything of it."""
