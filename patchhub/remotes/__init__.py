"""Where stores are shared: one interface, folders and the Hugging Face Hub behind it, and what travels between."""
