"""What every Pagehold process has: settings, logs, a state folder, a progress file, failpoints."""
