"""The embedded dense demo model and the script that trained it."""
