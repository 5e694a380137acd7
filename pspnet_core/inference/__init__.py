"""From images to masks: the one inference path."""
