//! What a job is to have: for each volume its paths, and how it is forked, linked and committed.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::ArgMatches;

use super::{Attach, Existing, Link};
use crate::cli::ForkOptions;
use crate::cli::caches::{self, Cache, Sources};
use crate::cli::ending::When;
use crate::cli::paths::{self, Wish};
use crate::protocol::{Code, Failure};

/// A volume of a job, with all that is to be done with it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub wish: Wish,
    pub fork: ForkOptions,
    pub link: Link,
    pub existing: Existing,
    pub commit: When,
}

/// Plans a job: the volumes of the command line, then those that files and presets name.
///
/// # Errors
/// What is wrong with the command line, or with a file, and where.
pub fn plans(options: &Attach, matches: Option<&ArgMatches>) -> Result<Vec<Plan>, Failure> {
    let wishes = options.volumes.wishes(matches)?;
    let sources = Sources {
        config: options.config.as_deref(),
        pipeline: options.pipeline.as_deref(),
        step: options.step.as_deref(),
        presets: &options.preset,
        named: !wishes.is_empty(),
    };
    let mut plans: Vec<Plan> = wishes.into_iter().map(|w| of_wish(options, w)).collect();
    let caches = caches::asked(sources)?;
    for cache in caches {
        plans.extend(beside(&plans, cache).map(|cache| of_cache(options, cache)));
    }
    caches::tell_environment(&options.preset);
    plans.iter().try_for_each(refuse_read_only_seed)?;
    in_order(plans)
}

fn refuse_read_only_seed(plan: &Plan) -> Result<(), Failure> {
    if plan.existing != Existing::Seed || !plan.fork.read_only {
        return Ok(());
    }
    let message = format!(
        "volume {} is read-only and cannot be seeded",
        plan.wish.volume
    );
    Err(Failure::new(Code::Usage, message).hint("--existing hide covers what a path has"))
}

/// Puts volumes whose paths lie in another's behind it, which would cover them.
///
/// # Errors
/// A path that is named twice, or lies in another one of its volume; two volumes that have paths in each other's.
fn in_order(plans: Vec<Plan>) -> Result<Vec<Plan>, Failure> {
    let usage = |message: String| Failure::new(Code::Usage, message);
    let mut seen = HashSet::new();
    for plan in &plans {
        if let Some(path) = plan
            .wish
            .paths
            .iter()
            .find(|path| !seen.insert(paths::absolute(path)))
        {
            return Err(usage(format!("{} is named twice", path.display())));
        }
        paths::refuse_nested(&plan.wish)?;
    }
    let has_in = |inner: &Plan, outer: &Plan| {
        let mut pairs = inner
            .wish
            .paths
            .iter()
            .flat_map(|p| outer.wish.paths.iter().map(move |q| (p, q)));
        inner.wish.volume != outer.wish.volume && pairs.any(|(p, q)| paths::lies_in(p, q))
    };
    outer_first(plans, has_in).ok_or_else(|| {
        usage("two volumes have paths that lie in each other's".into())
            .hint("give one of them all of these paths")
    })
}

/// Puts what is in something else behind it, and leaves the order as it is where nothing is; None where there is no such order.
fn outer_first<T>(mut all: Vec<T>, is_in: impl Fn(&T, &T) -> bool) -> Option<Vec<T>> {
    let mut out = Vec::with_capacity(all.len());
    while !all.is_empty() {
        let free = |one: &T| !all.iter().any(|other| is_in(one, other));
        let at = all.iter().position(free)?;
        out.push(all.remove(at));
    }
    Some(out)
}

/// What is left of a preset's cache beside volumes that are as their user wants them.
fn beside(plans: &[Plan], mut cache: Cache) -> Option<Cache> {
    let taken = |path: &PathBuf| {
        let mut paths = plans.iter().flat_map(|plan| &plan.wish.paths);
        paths.any(|known| paths::absolute(known) == paths::absolute(path))
    };
    cache.paths.retain(|path| !taken(path));
    let known = plans.iter().any(|p| p.wish.volume == cache.volume);
    (!known && !cache.paths.is_empty()).then_some(cache)
}

fn of_wish(options: &Attach, wish: Wish) -> Plan {
    Plan {
        wish,
        fork: options.options.clone(),
        link: options.link.unwrap_or(Link::Bind),
        existing: options.existing.unwrap_or(Existing::Hide),
        commit: options.commit.unwrap_or(When::OnSuccess),
    }
}

/// The command line goes before what was said of the cache; lists have both.
fn of_cache(options: &Attach, cache: Cache) -> Plan {
    let mut fork = options.options.clone();
    fork.size = fork.size.or(cache.size);
    fork.read_only |= cache.read_only.unwrap_or(false);
    if fork.parent.is_empty() {
        fork.parent = cache.parents;
    }
    fork.label.splice(0..0, cache.labels);
    fork.label_file.splice(0..0, cache.label_files);
    fork.lock_file.splice(0..0, cache.lock_files);
    fork.exclude.splice(0..0, cache.exclude);
    Plan {
        wish: Wish {
            volume: cache.volume,
            paths: cache.paths,
            folders: true,
        },
        fork,
        link: options.link.or(cache.link).unwrap_or(Link::Bind),
        existing: options
            .existing
            .or(cache.existing)
            .unwrap_or(Existing::Hide),
        commit: options.commit.or(cache.commit).unwrap_or(When::OnSuccess),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::{CommandFactory, FromArgMatches};

    fn attach(line: &str) -> Attach {
        let words = std::iter::once("forkvol").chain(line.split(' '));
        let matches = Cli::command().try_get_matches_from(words).unwrap();
        match Cli::from_arg_matches(&matches).unwrap().command {
            crate::cli::Command::Attach(attach) => attach.into_inner(),
            other => panic!("{other:?}"),
        }
    }

    fn cache() -> Cache {
        let label = |value: &str| ("k".to_owned(), value.to_owned());
        Cache {
            volume: "shop".into(),
            paths: vec!["a".into()],
            size: Some(7),
            labels: vec![label("file")],
            parents: vec!["p".into()],
            exclude: vec!["x".into()],
            read_only: Some(true),
            commit: Some(When::Never),
            existing: Some(Existing::Seed),
            ..Cache::default()
        }
    }

    #[test]
    fn what_a_file_says_of_a_cache_is_done() {
        let plan = of_cache(&attach("attach --exclude y"), cache());
        assert!(plan.wish.has_folders(), "a lone path too");
        assert_eq!((plan.fork.size, plan.fork.read_only), (Some(7), true));
        assert_eq!(
            (plan.fork.parent, plan.fork.exclude),
            (vec!["p".into()], vec!["x".into(), "y".into()])
        );
        assert_eq!(
            (plan.link, plan.existing, plan.commit),
            (Link::Bind, Existing::Seed, When::Never)
        );
    }

    #[test]
    fn a_preset_leaves_alone_what_the_command_line_names() {
        let own = |volume: &str, path: &str| {
            let wish = Wish {
                volume: volume.into(),
                paths: vec![path.into()],
                folders: false,
            };
            of_wish(&attach("attach"), wish)
        };
        assert_eq!(beside(&[own("x", "other")], cache()), Some(cache()));
        assert_eq!(beside(&[own("x", "./a/")], cache()), None);
        assert_eq!(beside(&[own("shop", "other")], cache()), None);
        let two = Cache {
            paths: vec!["a".into(), "b".into()],
            ..cache()
        };
        let left = beside(&[own("x", "a")], two).unwrap();
        assert_eq!(left.paths, [PathBuf::from("b")]);
    }

    #[test]
    fn outer_paths_come_first_and_none_twice() {
        let of = |volumes: &[(&str, &[&str])]| {
            let plan = |(volume, paths): &(&str, &[&str])| {
                let wish = Wish {
                    volume: (*volume).into(),
                    paths: paths.iter().map(PathBuf::from).collect(),
                    folders: false,
                };
                of_wish(&attach("attach"), wish)
            };
            let said = |plan: Plan| {
                let paths = plan
                    .wish
                    .paths
                    .iter()
                    .map(|p| p.to_str().unwrap().to_owned());
                format!(
                    "{}: {}",
                    plan.wish.volume,
                    paths.collect::<Vec<_>>().join(" ")
                )
            };
            let plans = in_order(volumes.iter().map(plan).collect());
            plans
                .map(|plans| plans.into_iter().map(said).collect::<Vec<_>>())
                .map_err(|f| f.code)
        };
        let sorted = of(&[("a", &["z", "n/x"]), ("b", &["c"]), ("d", &["n", "./z/w"])]);
        assert_eq!(sorted, Err(Code::Usage), "a and d lie in each other");
        let sorted = of(&[("a", &["z", "n/x"]), ("b", &["c"]), ("d", &["./n"])]);
        assert_eq!(sorted.unwrap(), ["b: c", "d: ./n", "a: z n/x"]);
        for wrong in [
            &[("a", &["p", "./p"][..])][..],
            &[("a", &["p"]), ("b", &["p/"])],
            &[("a", &["n/x/y", "n/x"])],
        ] {
            assert_eq!(of(wrong), Err(Code::Usage));
        }
    }

    #[test]
    fn only_what_can_be_written_is_seeded() {
        let plan = of_cache(&attach("attach"), cache());
        assert_eq!(refuse_read_only_seed(&plan).unwrap_err().code, Code::Usage);
        let writable = Cache {
            read_only: None,
            ..cache()
        };
        let plan = of_cache(&attach("attach"), writable);
        assert!(refuse_read_only_seed(&plan).is_ok());
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let line =
            "attach --size 9 --parent q --label k=own --commit always --existing fail --link bind";
        let plan = of_cache(&attach(line), cache());
        assert_eq!(
            (plan.fork.size, plan.fork.parent),
            (Some(9), vec!["q".into()])
        );
        assert_eq!(plan.fork.label.last().unwrap().1, "own");
        assert_eq!(
            (plan.link, plan.existing, plan.commit),
            (Link::Bind, Existing::Fail, When::Always)
        );
    }
}
