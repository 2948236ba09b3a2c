//! Changes of the arms while the engine runs: checked and loaded aside, made as a whole or not at all, logged.

use std::sync::Arc;

use kvhook_abi::raw::*;
use serde_json::{Map, Value, json};

use crate::arm::{Arm, ArmState, Generation};
use crate::error::HostError;
use crate::guard::GuardSpec;
use crate::host::Host;
use crate::instance::live_instances;
use crate::load::Source;
use crate::sequence::Sequence;
use crate::spec::{self, ArmPatch, ArmSpec, MAX_SPEC_BYTES};

/// The most arms of a host.
pub const MAX_ARMS: usize = 64;

/// One change. A command is a list of them.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A new arm; its name must be free.
    Add(ArmSpec),
    /// An arm's spec, with what the patch says, and new instances.
    Replace(String, ArmPatch),
    /// A new arm, or all of an arm's spec and new instances.
    Set(ArmSpec),
    /// An arm's share.
    Weight(String, f64),
    /// What an arm does with sequences.
    State(String, ArmState),
    /// What switches an arm off by itself.
    Guard(String, Option<GuardSpec>),
    /// An arm goes, with its figures.
    Remove(String),
    /// Whether no arm serves any sequence.
    SafeMode(bool),
}

impl Change {
    fn loads(&self) -> bool {
        matches!(self, Self::Add(_) | Self::Replace(..) | Self::Set(_))
    }
}

/// Parses a command: `{"changes": [{"add": {...}}, ...]}`. See `docs/live.md`.
///
/// # Errors
/// [`HostError::Spec`] with the place, what was found and what is allowed.
pub fn parse(text: &str, source: Source) -> Result<Vec<Change>, HostError> {
    parse_command(text, source).map_err(HostError::Spec)
}

fn parse_command(text: &str, source: Source) -> Result<Vec<Change>, String> {
    if text.len() > MAX_SPEC_BYTES {
        return Err(format!("it has {} bytes; at most {MAX_SPEC_BYTES} are taken", text.len()));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(command) = &value else { return Err(spec::wrong("command", &value, "an object")) };
    spec::check_keys(command, &["changes"], "a command")?;
    let Some(Value::Array(list)) = command.get("changes") else {
        return Err("`changes` is missing, or not a list".to_owned());
    };
    let mut changes = Vec::new();
    for (index, change) in list.iter().enumerate() {
        let parsed = parse_change(change, source, &mut changes);
        parsed.map_err(|error| format!("`changes[{index}]`: {error}"))?;
    }
    Ok(changes)
}

const CHANGES: [&str; 8] = ["add", "replace", "set", "weights", "state", "guard", "remove", "safe_mode"];

fn parse_change(value: &Value, source: Source, changes: &mut Vec<Change>) -> Result<(), String> {
    let one = value.as_object().filter(|object| object.len() == 1).and_then(|object| object.iter().next());
    let Some((kind, body)) = one else {
        return Err(format!("it is {}; expected an object with one key: {}", brief(value), CHANGES.join(", ")));
    };
    let object = || body.as_object().ok_or_else(|| spec::wrong(kind, body, "an object"));
    match kind.as_str() {
        "add" => changes.push(Change::Add(spec::parse_named_arm(object()?, source)?)),
        "set" => changes.push(Change::Set(spec::parse_named_arm(object()?, source)?)),
        "replace" => {
            let (name, patch) = spec::parse_named_patch(object()?, source)?;
            changes.push(Change::Replace(name, patch));
        }
        "weights" => {
            for (name, weight) in object()? {
                let weight = spec::weight_of("weight", weight)?;
                changes.push(Change::Weight(name.clone(), weight));
            }
        }
        "state" => {
            for (name, state) in object()? {
                changes.push(Change::State(name.clone(), spec::state_of(state)?));
            }
        }
        "guard" => {
            for (name, guard) in object()? {
                changes.push(Change::Guard(name.clone(), spec::guard_of(Some(guard))?));
            }
        }
        "remove" => {
            let name = body.as_str().ok_or_else(|| spec::wrong(kind, body, "the name of an arm"))?;
            changes.push(Change::Remove(name.to_owned()));
        }
        "safe_mode" => {
            let on = body.as_bool().ok_or_else(|| spec::wrong(kind, body, "true or false"))?;
            changes.push(Change::SafeMode(on));
        }
        _ => spec::check_keys(value.as_object().unwrap_or(&Map::new()), &CHANGES, "a change")?,
    }
    Ok(())
}

fn brief(value: &Value) -> String {
    spec::shorten(&value.to_string())
}

/// An arm as it will be.
struct Draft {
    /// The arm, if it is there already.
    arm: Option<Arc<Arm>>,
    spec: ArmSpec,
    /// New instances; a new arm has some.
    generation: Option<Arc<Generation>>,
    guard_is_new: bool,
}

impl Draft {
    /// An arm as it is.
    fn of(arm: &Arc<Arm>) -> Self {
        let spec = ArmSpec { state: None, ..ArmSpec::clone(&arm.spec()) };
        Self { arm: Some(arm.clone()), spec, generation: None, guard_is_new: false }
    }

    fn renew(&mut self, spec: ArmSpec, generation: Arc<Generation>) {
        let state = spec.state.or(self.spec.state);
        self.spec = ArmSpec { state, ..spec };
        self.generation = Some(generation);
        self.guard_is_new = true;
    }
}

/// All arms as they will be.
struct Drafts {
    arms: Vec<Draft>,
    safe_mode: bool,
}

impl Drafts {
    fn of(arms: &[Arc<Arm>], safe_mode: bool) -> Self {
        Self { arms: arms.iter().map(Draft::of).collect(), safe_mode }
    }

    fn find(&mut self, name: &str) -> Result<usize, HostError> {
        let place = self.arms.iter().position(|draft| draft.spec.name == name);
        place.ok_or_else(|| HostError::UnknownArm {
            name: name.chars().take(80).collect(),
            known: self.arms.iter().map(|draft| draft.spec.name.clone()).collect(),
        })
    }

    /// Makes the changes; `load` gives an arm's new instances.
    fn make(
        &mut self,
        changes: &[Change],
        load: &mut dyn FnMut(&ArmSpec) -> Result<Arc<Generation>, HostError>,
    ) -> Result<(), HostError> {
        for change in changes {
            match change {
                Change::Add(spec) => {
                    if self.find(&spec.name).is_ok() {
                        let text =
                            format!("there is an arm `{}` already; `replace` it, or take another name", spec.name);
                        return Err(HostError::Spec(text));
                    }
                    self.add(spec, load)?;
                }
                Change::Set(spec) => match self.find(&spec.name) {
                    Ok(place) => self.arms[place].renew(spec.clone(), load(spec)?),
                    Err(_) => self.add(spec, load)?,
                },
                Change::Replace(name, patch) => {
                    let place = self.find(name)?;
                    let spec = patch.applied_to(&self.arms[place].spec);
                    let generation = load(&spec)?;
                    self.arms[place].renew(spec, generation);
                }
                Change::Weight(name, weight) => {
                    spec::check_weight(*weight).map_err(HostError::Argument)?;
                    let place = self.find(name)?;
                    self.arms[place].spec.weight = *weight;
                }
                Change::State(name, state) => {
                    let place = self.find(name)?;
                    self.arms[place].spec.state = Some(*state);
                    self.arms[place].guard_is_new = true;
                }
                Change::Guard(name, guard) => {
                    guard.map_or(Ok(()), |guard| guard.check()).map_err(HostError::Spec)?;
                    let place = self.find(name)?;
                    self.arms[place].spec.guard = *guard;
                    self.arms[place].guard_is_new = true;
                }
                Change::Remove(name) => {
                    let place = self.find(name)?;
                    self.arms.remove(place);
                }
                Change::SafeMode(on) => self.safe_mode = *on,
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        spec: &ArmSpec,
        load: &mut dyn FnMut(&ArmSpec) -> Result<Arc<Generation>, HostError>,
    ) -> Result<(), HostError> {
        if self.arms.len() >= MAX_ARMS {
            return Err(HostError::Spec(format!("there are {MAX_ARMS} arms; remove one first")));
        }
        let generation = Some(load(spec)?);
        self.arms.push(Draft { arm: None, spec: spec.clone(), generation, guard_is_new: true });
        Ok(())
    }
}

impl Host {
    /// Makes changes, in their order, as a whole or not at all.
    ///
    /// # Errors
    /// `Spec`, `UnknownArm`, `Argument` for a weight, `SafeMode`, and those of loading and creating; then nothing changed,
    /// and what was there goes on.
    pub fn change(&self, changes: &[Change]) -> Result<(), HostError> {
        let made = self.try_change(changes);
        if let Err(error) = &made {
            self.callbacks.log(KVH_LOG_WARN, format_args!("the arms stay as they are: {error}"));
        }
        made
    }

    /// As [`Host::change`], from a command's text.
    ///
    /// # Errors
    /// As [`Host::change`].
    pub fn control(&self, command: &str, source: Source) -> Result<(), HostError> {
        self.change(&parse(command, source)?)
    }

    fn try_change(&self, changes: &[Change]) -> Result<(), HostError> {
        let loads = changes.iter().any(Change::loads);
        let _loading = loads.then(|| self.loading.lock());
        let mut loaded = Vec::new();
        if loads {
            let lifted = changes.contains(&Change::SafeMode(false));
            if self.policy.safe_mode || (self.is_safe_mode() && !lifted) {
                return Err(HostError::SafeMode);
            }
            let mut load = |spec: &ArmSpec| {
                let generation = self.load(spec)?;
                loaded.push(generation.clone());
                Ok(generation)
            };
            Drafts::of(&self.arms(), false).make(changes, &mut load)?;
        }
        // Nobody else loads, so the second pass asks for the same instances, or fails where an arm was removed meanwhile.
        let mut next = loaded.iter().cloned();
        let mut take = |_: &ArmSpec| next.next().ok_or_else(|| HostError::Internal("a change loads twice".to_owned()));
        self.install(|drafts| drafts.make(changes, &mut take))
    }

    /// Replaces all arms by these, whose specs are of different names.
    ///
    /// # Errors
    /// As [`Host::change`].
    pub(crate) fn set_all(&self, specs: &[ArmSpec]) -> Result<(), HostError> {
        let _loading = self.loading.lock();
        let loaded = specs.iter().map(|spec| self.load(spec)).collect::<Result<Vec<_>, _>>()?;
        self.install(|drafts| {
            drafts.arms.retain(|draft| specs.iter().any(|spec| spec.name == draft.spec.name));
            for (spec, generation) in specs.iter().zip(&loaded) {
                drafts.make(&[Change::Set(spec.clone())], &mut |_| Ok(generation.clone()))?;
            }
            Ok(())
        })
    }

    /// Exchanges the arms under the locks.
    fn install(&self, make: impl FnOnce(&mut Drafts) -> Result<(), HostError>) -> Result<(), HostError> {
        let changing = self.changing.lock();
        let before = self.arms();
        let was = self.listed(&before);
        let mut drafts = Drafts::of(&before, self.is_safe_mode());
        make(&mut drafts)?;
        if self.policy.safe_mode && !drafts.safe_mode {
            return Err(HostError::SafeMode);
        }
        let mut after = Vec::with_capacity(drafts.arms.len());
        let mut updates = Vec::with_capacity(drafts.arms.len());
        for draft in drafts.arms {
            let Draft { arm, spec, generation, guard_is_new } = draft;
            match (arm, generation) {
                (Some(arm), generation) => {
                    after.push(arm.clone());
                    updates.push((arm, Arc::new(spec), generation, guard_is_new));
                }
                (None, Some(generation)) => after.push(Arc::new(Arm::new(spec, generation))),
                (None, None) => return Err(HostError::Internal(format!("arm {} has no instances", spec.name))),
            }
        }
        let mut old = Vec::with_capacity(updates.len());
        {
            let mut arms = self.arms.write();
            for (arm, spec, generation, guard_is_new) in updates {
                let (state, guard) = (spec.state, spec.guard);
                old.extend(arm.set(spec, generation).map(|generation| (generation, arm.clone())));
                if guard_is_new {
                    arm.guard.set(guard);
                }
                if let Some(state) = state {
                    arm.set_state(state);
                }
            }
            for arm in before.iter().filter(|arm| !after.iter().any(|other| Arc::ptr_eq(arm, other))) {
                old.push((arm.remove(), arm.clone()));
            }
            *arms = after.clone();
            self.set_safe_mode(drafts.safe_mode);
        }
        let is = self.listed(&after);
        drop(changing);
        self.callbacks.log(KVH_LOG_INFO, format_args!("arms changed from {was} to {is}"));
        let mut older = self.older.lock();
        older.retain(|(_, generation)| generation.strong_count() > 0);
        older.extend(old.iter().map(|(generation, arm)| (arm.name.clone(), Arc::downgrade(generation))));
        drop(older);
        for (generation, arm) in old {
            drop(generation);
            self.migrate_all(&arm);
        }
        Ok(())
    }

    /// The arms as JSON text: `{"safe_mode": false, "instances": 1, "arms": [{"name": ..., ...}], "older": [...]}`, with
    /// the keys of the form, and `cause` and `live`. `instances` are those of all hosts of the process that are not destroyed
    /// yet. `older` are instances that were replaced or whose arm was removed, and are still
    /// needed: `{"arm": ..., "plugin": ..., "sequences": 3}`.
    pub fn arms_json(&self) -> String {
        let arms: Vec<Value> = self.arms().iter().map(|arm| arm_json(arm)).collect();
        let older: Vec<Value> = self.older_instances().collect();
        json!({ "safe_mode": self.is_safe_mode(), "instances": live_instances(), "arms": arms, "older": older })
            .to_string()
    }

    /// Instances that were replaced, with the number of sequences that they serve.
    fn older_instances(&self) -> impl Iterator<Item = Value> {
        let older = self.older.lock().clone();
        let mut sequences = Vec::new();
        self.visit_sequences(|sequence| sequences.push(sequence.clone()));
        older.into_iter().filter_map(move |(arm, generation)| {
            let generation = generation.upgrade()?;
            let served = |sequence: &&Arc<Sequence>| Arc::ptr_eq(&sequence.state.lock().generation, &generation);
            let sequences = sequences.iter().filter(served).count();
            Some(json!({ "arm": arm, "plugin": generation.plugin, "sequences": sequences }))
        })
    }

    /// The arms in a log line.
    fn listed(&self, arms: &[Arc<Arm>]) -> String {
        let arms: Vec<String> = arms
            .iter()
            .map(|arm| {
                let spec = arm.spec();
                let (name, plugin, config) = (&arm.name, &spec.plugin, spec::shorten(&spec.config));
                format!("{name} ({plugin} {config:?}, weight {}, {})", spec.weight, arm.state().name())
            })
            .collect();
        let safe_mode = if self.is_safe_mode() { ", safe mode" } else { "" };
        format!("[{}{safe_mode}]", arms.join(", "))
    }

    /// Where a guard found a cause, its arm is switched off.
    pub(crate) fn judge(&self, arm: &Arm, cause: Option<String>) {
        if let Some(cause) = cause.filter(|cause| arm.trip(cause)) {
            let text = format_args!("arm {}: its guard switched it off: {cause}", arm.name);
            self.callbacks.log(KVH_LOG_WARN, text);
        }
    }
}

fn arm_json(arm: &Arm) -> Value {
    let spec = arm.spec();
    let guard = spec.guard.map(|guard| {
        json!({
            "failed": guard.failed,
            "sequences": guard.sequences,
            "ns_per_token": guard.ns_per_token,
            "tokens": guard.tokens,
        })
    });
    json!({
        "name": arm.name,
        "plugin": spec.plugin,
        "config": spec.config,
        "sha256": spec.sha256.map(|hash| hash.to_string()),
        "layers": spec.layers.as_ref().map(ToString::to_string),
        "min_tokens": spec.min_tokens,
        "weight": spec.weight,
        "state": arm.state().name(),
        "guard": guard,
        "cause": arm.cause(),
        "live": arm.figures.read().live,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let text = r#"{"changes": [
            {"add": {"name": "b", "plugin": "truncate", "state": "shadow", "guard": {"failed": 0.5}}},
            {"replace": {"name": "a", "config": {"keep": 0.25}}},
            {"weights": {"a": 9, "b": 1}}, {"state": {"a": "draining"}}, {"guard": {"b": null}},
            {"remove": "c"}, {"safe_mode": false}]}"#;
        let b = ArmSpec {
            state: Some(ArmState::Shadow),
            guard: Some(GuardSpec { failed: 0.5, ..GuardSpec::default() }),
            ..ArmSpec::new("b", "truncate", "")
        };
        let patch = ArmPatch { config: Some(r#"{"keep":0.25}"#.into()), ..ArmPatch::default() };
        let expected = [
            Change::Add(b),
            Change::Replace("a".into(), patch),
            Change::Weight("a".into(), 9.0),
            Change::Weight("b".into(), 1.0),
            Change::State("a".into(), ArmState::Draining),
            Change::Guard("b".into(), None),
            Change::Remove("c".into()),
            Change::SafeMode(false),
        ];
        assert_eq!(parse(text, Source::Operator).unwrap(), expected);
    }

    #[test]
    fn a_patch_leaves_what_it_does_not_name() {
        let arm = ArmSpec { min_tokens: 7, weight: 3.0, ..ArmSpec::new("a", "truncate", "keep=0.5") };
        let patch = |text: &str| match parse(text, Source::Model).unwrap().remove(0) {
            Change::Replace(_, patch) => patch.applied_to(&arm),
            other => panic!("{other:?}"),
        };
        let config = patch(r#"{"changes": [{"replace": {"name": "a", "config": "keep=0.1"}}]}"#);
        assert_eq!(config, ArmSpec { config: "keep=0.1".into(), ..arm.clone() });
        let plugin = patch(r#"{"changes": [{"replace": {"name": "a", "plugin": "noop"}}]}"#);
        let expected = ArmSpec { plugin: "noop".into(), config: String::new(), source: Source::Model, ..arm.clone() };
        assert_eq!(plugin, expected);
    }

    #[test]
    fn refusals_name_the_place() {
        for (text, words) in [
            ("", "not JSON"),
            ("[]", "`command` is []"),
            ("{}", "`changes` is missing"),
            (r#"{"change": []}"#, "did you mean `changes`?"),
            (r#"{"changes": [3]}"#, "`changes[0]`: it is 3; expected an object with one key"),
            (r#"{"changes": [{"remove": "a", "add": {}}]}"#, "with one key"),
            (
                r#"{"changes": [{"safe_mode": true}, {"remov": "a"}]}"#,
                "`changes[1]`: a change has the unknown key `remov`",
            ),
            (r#"{"changes": [{"remove": 3}]}"#, "`remove` is 3; expected the name of an arm"),
            (r#"{"changes": [{"add": {"name": "a"}}]}"#, "`plugin` is missing"),
            (r#"{"changes": [{"replace": {"config": ""}}]}"#, "`name` is missing"),
            (r#"{"changes": [{"weights": {"a": "9"}}]}"#, "`weight` is \"9\""),
            (r#"{"changes": [{"state": {"a": "off"}}]}"#, "`state` is \"off\""),
            (r#"{"changes": [{"guard": {"a": {"tokens": 0}}}]}"#, "`tokens` is 0"),
            (r#"{"changes": [{"safe_mode": 1}]}"#, "true or false"),
        ] {
            let error = parse(text, Source::Operator).unwrap_err();
            assert_eq!(error.status(), crate::raw::KVHOOK_ERR_SPEC);
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let long = format!(r#"{{"changes": [{{"remove": "{}"}}]}}"#, "x".repeat(1 << 16));
        assert!(parse(&long, Source::Operator).unwrap_err().to_string().contains("at most 65536"));
    }
}
