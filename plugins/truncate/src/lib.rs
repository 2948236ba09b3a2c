//! The plugin that keeps sinks, recent entries and a sample of the history.
