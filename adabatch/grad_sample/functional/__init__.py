"""Parameters used outside the layers that own them: traced, expressed, measured."""
