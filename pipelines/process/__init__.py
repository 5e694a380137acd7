"""What any long-running process needs: environment, signals, progress, work in the background."""
