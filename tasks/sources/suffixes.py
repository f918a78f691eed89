"""Suffixes of file names that stand for images."""

from __future__ import annotations

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jpg_large", ".jpeg_large", ".png_large", ".jpg_orig", ".png_orig"}
    # Image formats that are not supported: listed so that these files go to quarantine with their kind.
    | {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".svg", ".exr", ".hdr"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".tga", ".ico", ".pcx", ".dds", ".qoi"}
    | {".eps", ".xcf", ".pfm", ".pam", ".jxr", ".dcm", ".fits"}
)
OTHER_SUFFIXES = frozenset(
    {".txt", ".caption", ".cls", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".html", ".tar"}
)
"""Suffixes of other known files; files with any other suffix are identified by their content."""
