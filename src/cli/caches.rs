//! Which volumes a job has where its command line names none: what its CI host hands over, the `cache` key of a pipeline or of a
//! `.forkvol.yml`, and presets.
//!
//! All of them come to the same: a volume, its paths, and what else was said of it. What is said nowhere is as attach does it.

mod keys;
mod names;
mod pipeline;
mod presets;
mod yaml;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::keys::Said;
use self::names::{Matrix, Scope};
use self::pipeline::Step;
use self::presets::{PRESETS, Preset};
use self::yaml::{Fault, Node};
use super::ending::When;
use super::job::{Existing, Link};
use super::output;
use crate::protocol::{Bytes, Code, Failure};

/// The file that is read where nothing else says what a job has.
pub const OWN_FILE: &str = ".forkvol.yml";
/// What a Buildkite agent hands over: the paths of the step's cache with commas between them.
const AGENT_PATHS: &str = "BUILDKITE_AGENT_CACHE_PATHS";

/// A volume as a job wants it. Each of its paths has a folder of its own in the volume, a lone one too: another job of the same
/// volume may have more of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cache {
    pub volume: String,
    pub paths: Vec<PathBuf>,
    pub size: Option<u64>,
    pub labels: Vec<(String, String)>,
    pub label_files: Vec<PathBuf>,
    pub lock_files: Vec<PathBuf>,
    pub parents: Vec<String>,
    pub exclude: Vec<String>,
    pub read_only: Option<bool>,
    pub commit: Option<When>,
    pub link: Option<Link>,
    pub existing: Option<Existing>,
}

impl Cache {
    fn named(volume: &str) -> Cache {
        Cache {
            volume: volume.into(),
            ..Cache::default()
        }
    }

    /// Adds what somebody else says of the same volume, whose word counts more. Lists are united, but for the ordered one.
    fn add(&mut self, other: Cache) {
        fn unite<T: PartialEq>(all: &mut Vec<T>, new: Vec<T>) {
            for one in new {
                if !all.contains(&one) {
                    all.push(one);
                }
            }
        }
        unite(&mut self.paths, other.paths);
        unite(&mut self.label_files, other.label_files);
        unite(&mut self.lock_files, other.lock_files);
        unite(&mut self.exclude, other.exclude);
        // Of two labels with one key the later one counts.
        self.labels.extend(other.labels);
        if !other.parents.is_empty() {
            self.parents = other.parents;
        }
        self.size = other.size.or(self.size);
        self.read_only = other.read_only.or(self.read_only);
        self.commit = other.commit.or(self.commit);
        self.link = other.link.or(self.link);
        self.existing = other.existing.or(self.existing);
    }
}

/// Where a job's caches are to be looked for.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    pub config: Option<&'a Path>,
    pub pipeline: Option<&'a Path>,
    pub step: Option<&'a str>,
    pub presets: &'a [String],
    /// Whether the command line names volumes, so that nothing is looked for unasked.
    pub named: bool,
}

/// The world that a job runs in.
struct World<'a> {
    slug: String,
    variable: &'a dyn Fn(&str) -> Option<String>,
    folder: &'a Path,
}

/// Finds the caches of a job that runs in the current folder. What was understood otherwise than it was written is a warning.
///
/// # Errors
/// A file that cannot be read or is wrong, with the place; a path that two volumes want.
pub fn asked(sources: Sources) -> Result<Vec<Cache>, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let world = World {
        slug: slug_of(&std::env::current_dir().unwrap_or_default()),
        variable: &variable,
        folder: Path::new("."),
    };
    let (caches, warnings) = world.asked(sources)?;
    warnings.iter().for_each(|warning| output::warn(warning));
    Ok(caches)
}

/// The pipeline's name, as its host says or after the folder.
fn slug_of(folder: &Path) -> String {
    let host = std::env::var("BUILDKITE_PIPELINE_SLUG").ok();
    names::slug(host.as_deref(), folder.file_name().and_then(OsStr::to_str))
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Code::Usage, message)
}

impl World<'_> {
    fn scope(&self) -> Scope<'_> {
        Scope {
            slug: &self.slug,
            variable: self.variable,
            matrix: Matrix::None,
        }
    }

    fn asked(&self, sources: Sources) -> Result<(Vec<Cache>, Vec<String>), Failure> {
        let mut warnings = Vec::new();
        let unasked = !sources.named && sources.presets.is_empty();
        let handed = (self.variable)(AGENT_PATHS).filter(|paths| !paths.is_empty());
        let own = self.folder.join(OWN_FILE);
        let mut caches = if let Some(file) = sources.pipeline {
            self.of_pipeline(file, sources.step, &mut warnings)?
        } else if let Some(file) = sources.config {
            self.of_config(file, &mut warnings)?
        } else if let Some(paths) = handed.filter(|_| unasked) {
            self.of_agent(&paths)?
        } else if unasked && own.exists() {
            self.of_config(&own, &mut warnings)?
        } else {
            Vec::new()
        };
        for (preset, because) in self.presets(sources.presets)? {
            let cache = preset.cache(self.folder, &self.scope());
            let cache = cache.map_err(|fault| usage(format!("{because}: {}", fault.what)))?;
            join(&mut caches, cache);
        }
        refuse_shared_paths(&caches)?;
        Ok((caches, warnings))
    }

    fn of_agent(&self, paths: &str) -> Result<Vec<Cache>, Failure> {
        let mut cache = Cache::named(&self.slug);
        for path in paths.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let path = super::values::home_path(path)
                .map_err(|what| usage(format!("{AGENT_PATHS}: {what}")))?;
            let path = keys::plain(&path);
            if !cache.paths.contains(&path) {
                cache.paths.push(path);
            }
        }
        Ok(match cache.paths.is_empty() {
            true => Vec::new(),
            false => vec![cache],
        })
    }

    fn of_config(&self, file: &Path, warnings: &mut Vec<String>) -> Result<Vec<Cache>, Failure> {
        let mut notes = Vec::new();
        let read = |root: &Node| {
            let Some(entries) = root.entries() else {
                return Err(root.fault(format!("this is {}, and cache is a key", root.is_a())));
            };
            if let Some(entry) = entries.iter().find(|entry| entry.key != "cache") {
                let what = format!("unknown key {:?}; known is cache", entry.key);
                return Err(Fault::new(entry.place, what));
            }
            match root.get("cache") {
                Some(cache) => keys::read(cache, &self.scope(), &mut notes),
                None => Ok(Said::Nothing),
            }
        };
        let said = read_file(file, read)?;
        warnings.extend(
            notes
                .iter()
                .map(|note| format!("{}:{note}", file.display())),
        );
        Ok(match said {
            Said::Caches(caches) => caches,
            Said::Nothing | Said::Off => Vec::new(),
        })
    }

    /// The step is the one that is named, else that of the job's variables; a pipeline that does not have it has come from somewhere
    /// else, and what its root says still holds.
    fn of_pipeline(
        &self,
        file: &Path,
        step: Option<&str>,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Cache>, Failure> {
        let variable = |name: &str| (self.variable)(name).filter(|value| !value.is_empty());
        let label = variable("BUILDKITE_LABEL");
        let own = variable("BUILDKITE_STEP_KEY").or_else(|| label.clone());
        let label = label.as_deref();
        let mut notes = Vec::new();
        let mut of = |name: Option<&str>| {
            let step = name.map(|name| Step { name, label });
            read_file(file, |root| {
                notes.clear();
                pipeline::caches(root, step, &self.scope(), &mut notes)
            })
        };
        let caches = match (step, own.as_deref()) {
            (Some(step), _) => of(Some(step))?,
            (None, None) => of(None)?,
            (None, Some(own)) => {
                let lacks = read_file(file, |root| Ok(pipeline::lacks(root, own, &self.scope())))?;
                if let Some(fault) = &lacks {
                    let shown = file.display();
                    warnings.push(format!("{shown}:{fault}; the caches are those of the root"));
                }
                of(lacks.is_none().then_some(own))?
            }
        };
        warnings.extend(
            notes
                .iter()
                .map(|note| format!("{}:{note}", file.display())),
        );
        Ok(caches)
    }

    /// The presets that are named, `auto` being those that the folder tells of.
    fn presets(&self, named: &[String]) -> Result<Vec<(&'static Preset, String)>, Failure> {
        let mut out: Vec<(&'static Preset, String)> = Vec::new();
        for name in named {
            let found = match (name.as_str(), presets::named(name)) {
                ("auto", _) => presets::found(self.folder)
                    .into_iter()
                    .map(|(preset, file)| (preset, file.to_owned()))
                    .collect(),
                (_, Some(preset)) => vec![(preset, format!("--preset {name}"))],
                (_, None) => {
                    let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
                    let hint = format!("there are auto, {}", known.join(", "));
                    return Err(usage(format!("there is no preset {name}")).hint(hint));
                }
            };
            for (preset, because) in found {
                if !out.iter().any(|(known, _)| known.name == preset.name) {
                    out.push((preset, because));
                }
            }
        }
        Ok(out)
    }
}

/// Adds a preset to what was said already, which counts more: a path that is taken is left out.
fn join(caches: &mut Vec<Cache>, mut preset: Cache) {
    let taken = |path: &PathBuf| caches.iter().any(|cache| cache.paths.contains(path));
    preset.paths.retain(|path| !taken(path));
    if preset.paths.is_empty() {
        return;
    }
    match caches.iter_mut().find(|c| c.volume == preset.volume) {
        Some(known) => {
            let said = std::mem::replace(known, preset);
            known.add(said);
        }
        None => caches.push(preset),
    }
}

fn refuse_shared_paths(caches: &[Cache]) -> Result<(), Failure> {
    for (at, cache) in caches.iter().enumerate() {
        for other in &caches[..at] {
            if let Some(path) = cache.paths.iter().find(|path| other.paths.contains(path)) {
                let message = format!(
                    "{} is wanted for the volumes {} and {}",
                    path.display(),
                    other.volume,
                    cache.volume
                );
                return Err(usage(message).hint("leave it to one of them"));
            }
        }
    }
    Ok(())
}

/// Reads a file of YAML; a fault in it is named with file, line and column.
fn read_file<T>(path: &Path, read: impl FnOnce(&Node) -> Result<T, Fault>) -> Result<T, Failure> {
    let text = (|| {
        // What is no file might never end, or never begin.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is not a file"));
        }
        let mut text = String::new();
        let most = yaml::MAX_BYTES as u64 + 1;
        File::open(path)?.take(most).read_to_string(&mut text)?;
        Ok(text)
    })();
    let text = text.map_err(|error| {
        usage(format!(
            "cannot read {}: {}",
            path.display(),
            output::reason(&error)
        ))
    })?;
    let node = yaml::parse(&text);
    node.and_then(|node| read(&node))
        .map_err(|fault| usage(format!("{}:{fault}", path.display())))
}

/// Tells what the presets need to be used well.
pub fn tell_environment(presets: &[String]) {
    let world = World {
        slug: String::new(),
        variable: &|_| None,
        folder: Path::new("."),
    };
    for (preset, _) in world.presets(presets).unwrap_or_default() {
        for (name, value) in preset.environment {
            if std::env::var_os(name).is_none() {
                output::note(&format!("for {} set {name}={value}", preset.name));
            }
        }
    }
}

fn no_folder(path: &Path, why: &str) -> Failure {
    let message = format!("cannot look into {}: {why}", path.display());
    Failure::new(Code::Failed, message)
}

/// `detect`: what `--preset auto` would take in a folder, and why.
pub fn detect(json: bool, folder: &Path) -> Result<(), Failure> {
    let path = std::path::absolute(folder)
        .and_then(std::fs::canonicalize)
        .map_err(|error| no_folder(folder, &output::reason(&error)))?;
    if !path.is_dir() {
        return Err(no_folder(folder, "it is a file").hint("name the folder that it is in"));
    }
    let document = detected(&path, &slug_of(&path));
    if presets::found(&path).is_empty() {
        output::note(&format!(
            "{} has nothing that tells of a tool",
            path.display()
        ));
    }
    output::show(json, &document, |document| {
        document["detect"]["config"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    })
}

fn detected(folder: &Path, slug: &str) -> Value {
    let found = presets::found(folder);
    let mut config = String::new();
    if !found.is_empty() {
        config.push_str("cache:\n");
        config.extend(
            found
                .iter()
                .map(|(preset, file)| preset.snippet(folder, file)),
        );
    }
    let preset = |(preset, file): &(&Preset, &str)| {
        let environment: serde_json::Map<String, Value> = preset
            .environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        json!({
            "preset": preset.name,
            "because": file,
            "volume": format!("{slug}/{}", preset.name),
            "paths": preset.paths,
            "lock_files": preset.locks_in(folder),
            "environment": environment,
        })
    };
    let presets: Vec<Value> = found.iter().map(preset).collect();
    json!({"detect": {
        "folder": Bytes(folder.as_os_str().as_bytes().to_vec()),
        "presets": presets,
        "config": config,
    }})
}

#[cfg(test)]
mod tests;
