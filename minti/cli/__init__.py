"""What the commands share, and what no single one of them owns.

Options and config files, the folder that a command works in, several processes, progress, exit codes and the
one line of an error; pictures as PNG, plots as SVG, and the head of HTML reports. Nothing here knows what is
learned or judged. May import `model` and `formats`.
"""
