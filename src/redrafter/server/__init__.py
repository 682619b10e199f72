"""An HTTP server with OpenAI's API over the engine (`redrafter serve`).  Needs the extra `server`."""
