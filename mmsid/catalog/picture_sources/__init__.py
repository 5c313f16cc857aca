"""Sources of pictures: local files, bytes and texts in table cells, web servers and object stores."""
