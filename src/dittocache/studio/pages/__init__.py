"""One file a page; each has `page(studio)`, which builds what stands between header and footer."""
