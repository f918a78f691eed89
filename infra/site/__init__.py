"""The documentation site: what MkDocs needs beyond the Markdown in `docs/`."""
