//! The plugin that implements every hook point and keeps everything.
