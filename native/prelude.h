/* SPDX-License-Identifier: MIT
 *
 * What the generated binding includes before the declarations of zswapfs.h.
 */
#include <stdint.h>

#include "zswapfs.h"
