//! A plugin that misbehaves on request, for the fault matrix.
