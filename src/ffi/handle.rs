//! Handles: numbers for blenders and plans that are never dereferenced. A generation counter tells a destroyed handle from
//! a live one, so a call after `_destroy` is an error instead of undefined behaviour. A call in a forked process on a
//! handle of its parent is an error too: the threads and the device context that it needs exist only in the parent.

use std::sync::{Arc, PoisonError, RwLock};

use super::status::{Fault, Outcome};
use crate::error::Error;
use crate::process::Process;

/// Bits of a handle, from the lowest: the kind, so that no handle is 0 or valid for another kind; the slot; the generation.
const KIND_BITS: u32 = 4;
const SLOT_BITS: u32 = usize::BITS / 2 - KIND_BITS;
const GENERATIONS: usize = 1 << (usize::BITS / 2);

/// The values behind the handles of one kind.
#[derive(Debug)]
pub(super) struct Handles<T> {
    kind: usize,
    name: &'static str,
    slots: RwLock<Slots<T>>,
}

#[derive(Debug)]
struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: usize,
    entry: Option<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    /// Made the value. A call must not wait for the locks of another one, which nobody may release here.
    process: Process,
    value: Shared<T>,
}

/// A value behind a lock, in case the caller breaks the thread rule; `None` once it is destroyed.
type Shared<T> = Arc<RwLock<Option<T>>>;

impl<T> Handles<T> {
    /// No handles yet; `kind` is from 1 to 15.
    pub(super) const fn new(kind: usize, name: &'static str) -> Self {
        Handles { kind, name, slots: RwLock::new(Slots { slots: Vec::new(), free: Vec::new() }) }
    }

    /// Stores a value and returns its handle, which is not 0.
    pub(super) fn insert(&self, value: T) -> Outcome<usize> {
        let mut guard = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slots = &mut *guard;
        let full = || Error::OutOfMemory { what: "handles", bytes: size_of::<Slot<T>>() as u64 };
        let process = Process::current()?;
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None if slots.slots.len() >> SLOT_BITS != 0 => return Err(full().into()),
            None => {
                slots.slots.try_reserve(1).map_err(|_| full())?;
                slots.slots.push(Slot { generation: 0, entry: None });
                slots.slots.len() - 1
            }
        };
        slots.slots[slot].entry = Some(Entry { process, value: Arc::new(RwLock::new(Some(value))) });
        Ok((slots.slots[slot].generation << SLOT_BITS | slot) << KIND_BITS | self.kind)
    }

    /// Calls `body` with shared access to the value of `handle`.
    pub(super) fn read<R>(&self, handle: usize, body: impl FnOnce(&T) -> Outcome<R>) -> Outcome<R> {
        let shared = self.get(handle)?;
        let value = shared.read().map_err(|_| panicked())?;
        body(value.as_ref().ok_or_else(|| self.unknown(handle))?)
    }

    /// Calls `body` with exclusive access to the value of `handle`. If `body` panics, the value can only be destroyed.
    pub(super) fn write<R>(&self, handle: usize, body: impl FnOnce(&mut T) -> Outcome<R>) -> Outcome<R> {
        let shared = self.get(handle)?;
        let mut value = shared.write().map_err(|_| panicked())?;
        body(value.as_mut().ok_or_else(|| self.unknown(handle))?)
    }

    /// Drops the value of `handle`, if there is one, after the running calls on it. Calls that wait for it get an error.
    pub(super) fn destroy(&self, handle: usize) {
        // Outside of the lock on the slots: the drop can wait for a device, and other calls must not.
        let value = self.remove(handle).map(|shared| shared.write().unwrap_or_else(PoisonError::into_inner).take());
        drop(value);
    }

    /// The value of `handle`.
    fn get(&self, handle: usize) -> Outcome<Shared<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let slot = self.slot(handle).and_then(|(slot, generation)| {
            slots.slots.get(slot).filter(|slot| slot.generation == generation)?.entry.as_ref()
        });
        let Entry { process, value } = slot.ok_or_else(|| self.unknown(handle))?;
        if !process.is_current() {
            let name = self.name;
            return Err(Fault::Argument(format!("{name} {handle:#x} was made before this process was forked")));
        }
        Ok(value.clone())
    }

    /// Removes the value of `handle`. In a forked process the parent's values stay: their drop would wait for threads that do
    /// not exist there.
    fn remove(&self, handle: usize) -> Option<Shared<T>> {
        let (index, generation) = self.slot(handle)?;
        let mut guard = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slots = &mut *guard;
        let slot = slots.slots.get_mut(index).filter(|slot| slot.generation == generation)?;
        if !slot.entry.as_ref()?.process.is_current() {
            return None;
        }
        let value = slot.entry.take()?.value;
        // A slot whose generations are used up is never used again.
        if slot.generation + 1 < GENERATIONS {
            slot.generation += 1;
            slots.free.push(index);
        }
        Some(value)
    }

    fn slot(&self, handle: usize) -> Option<(usize, usize)> {
        let number = handle >> KIND_BITS;
        let slot = number & ((1 << SLOT_BITS) - 1);
        (handle & ((1 << KIND_BITS) - 1) == self.kind).then_some((slot, number >> SLOT_BITS))
    }

    fn unknown(&self, handle: usize) -> Fault {
        Fault::Argument(match handle {
            0 => format!("{} is NULL", self.name),
            _ => format!("{} {handle:#x} is destroyed, or never was one", self.name),
        })
    }
}

fn panicked() -> Fault {
    Fault::Panicked("an earlier call on this handle panicked; all that is left is to destroy it".into())
}
