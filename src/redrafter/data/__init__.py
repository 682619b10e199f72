"""Files of prompts, chats and texts, read as token rows."""
