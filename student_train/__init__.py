"""Train students from a teacher cache, without the teacher."""
