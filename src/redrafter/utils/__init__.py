"""Files, output folders, the Hub, memory, progress and interrupts: code without models."""
