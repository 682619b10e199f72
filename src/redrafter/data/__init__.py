"""Reads prompts, chats and texts from files and converts them to token ids."""
