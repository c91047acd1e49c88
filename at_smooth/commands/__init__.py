"""The commands of ``at-smooth``, one a file; they import what they need when they run, since torch takes seconds."""
